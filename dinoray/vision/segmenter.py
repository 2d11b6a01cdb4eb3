"""The inference engine of distance maps: windows of images -> maps and tokens -> cells and their mean features.

An image is cut into overlapping windows that begin at multiples of the patch size, so that the tokens of the windows lie
on one grid and are blended like the maps. Windows of equal size may share a batch, whichever image they come from.

Same bytes: for one batch of windows the result depends on the windows, the weights, precision and library versions only,
under the rules of dinoray.vision.extractor (padding to a ladder of sizes, one thread per forward on CPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dinoray.errors import BadRequest, ItemError
from dinoray.memory.budget import decoded_tokens, micro_batch, padded_batch
from dinoray.vision.backoff import BackOff
from dinoray.vision.blending import Blend
from dinoray.vision.cell_tokens import mean_tokens
from dinoray.vision.distance_model import DistanceMapModel, SegmenterConfig
from dinoray.vision.instances import check_thresholds, instances
from dinoray.vision.resampling2d import resample


@dataclass(frozen=True)
class WindowedImage:
    """The windows float32 [3, wy, wx] of one image, in the order in which their predictions are merged."""

    windows: list[np.ndarray]
    """Views of the padded image."""
    blend: Blend

    @property
    def key(self) -> tuple[int, int]:
        """(wy, wx): windows with equal keys may share a batch."""
        return self.blend.shape

    def merge(self, maps: Sequence[np.ndarray]) -> np.ndarray:
        """The windows' maps [wy, wx] as the image's: float32 [H, W]."""
        return self.blend.merge(maps)

    def merge_tokens(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """The windows' tokens [wy/p, wx/p, D] as the image's: float32 [D, ceil(H/p), ceil(W/p)]."""
        # float32: in float64 the tokens of a large image would take gigabytes
        return self.blend.coarse().merge((np.moveaxis(grid, -1, 0) for grid in tokens), np.float32)


class Segmenter(BackOff):
    """Holds one model; `predict` may be called from several threads at once.

    `overlap_px` defaults to a quarter of the window, and is rounded down to the patch size; `peak`, `fill`, `markers` and
    `marker_height` default to the checkpoint's. Raises BadRequest for thresholds, markers, overlaps and windows that cannot be.
    """

    def __init__(self, model: DistanceMapModel, config: SegmenterConfig, *, token_budget: int, overlap_px: int | None = None,
                 peak: float | None = None, fill: float | None = None, markers: str | None = None,
                 marker_height: float | None = None, min_area_px: int = 0):
        super().__init__(next(model.parameters()).device)
        self.model, self.config, self.token_budget, self.min_area_px = model.eval(), config, token_budget, min_area_px
        self.device, self.patch = self._device, model.backbone.config.patch_size
        self.peak = config.peak if peak is None else peak
        self.fill = config.fill if fill is None else fill
        self.markers = config.markers if markers is None else markers
        self.marker_height = config.marker_height if marker_height is None else marker_height
        check_thresholds(self.peak, self.fill)
        if self.markers not in ("components", "hmaxima"):
            raise BadRequest(f"markers={markers!r}", todo="use components or hmaxima")
        self.overlap_px = (config.crop_px // 4 if overlap_px is None else overlap_px) // self.patch * self.patch
        self._blend(1, 1)  # refuses a window or an overlap that cannot be before the first image comes

    def _blend(self, height: int, width: int) -> Blend:
        return Blend(height, width, self.config.crop_px, self.overlap_px, multiple=self.patch, aligned=True)

    def plan_image(self, image: np.ndarray) -> WindowedImage:
        """The windows of an image float32 [3, H, W] in [0, 1] at the model's scale: padded by its mirror image to multiples
        of the patch size, none longer than `config.crop_px`."""
        blend = self._blend(*image.shape[1:])
        return WindowedImage(list(blend.windows(image)), blend)

    def micro_batch(self, wy: int, wx: int) -> int:
        """Windows of this size per batch, from the token budget alone.

        On CUDA a window counts with what its decoder needs: of patch 16 that is several times what its tokens need. A CPU
        decodes one window after the other.
        """
        shape = self.model.backbone.config
        tokens = shape.num_prefix + (wy // self.patch) * (wx // self.patch)
        if self.device.type != "cpu":
            tokens = decoded_tokens(tokens=tokens, dim=shape.dim, taps=len(self.model.taps), pixels=wy * wx,
                                    pixel_values=self.model.decoder.pixel_values)
        return micro_batch(self.token_budget, tokens)

    def predict(self, windows: Sequence[np.ndarray], tokens: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """Distance maps float32 [n, wy, wx] of windows float32 [3, wy, wx] of one size, and the backbone's last tokens
        float32 [n, wy/p, wx/p, D] where asked for, by one pass of the network.

        After an out-of-memory error of the device the batch is halved and replayed, and the smaller size is kept for this
        shape. Raises ItemError `device_memory` when even one window does not fit.
        """
        parts = self.in_parts((*windows[0].shape[1:], tokens), [(window, tokens) for window in windows])
        maps = np.concatenate([part[0] for part in parts])
        return maps, np.concatenate([part[1] for part in parts]) if tokens else None

    def _too_large(self, item: tuple[np.ndarray, bool]) -> ItemError:
        return ItemError("device_memory", f"one window of {item[0].shape[1:]} px does not fit the device",
                         todo="use a device with more memory, or a checkpoint with smaller crops")

    @torch.inference_mode()
    def _forward(self, items: Sequence[tuple[np.ndarray, bool]]) -> tuple[np.ndarray, np.ndarray | None]:
        n, (first, tokens) = len(items), items[0]
        batch = padded_batch(n, max(n, self.micro_batch(*first.shape[1:])))
        pixels = np.stack([window for window, _ in items] + [items[-1][0]] * (batch - n))
        x = torch.from_numpy(pixels).to(self.device)
        logits, grid = self.model.with_tokens(x) if tokens else (self.model(x), None)
        maps = torch.sigmoid(logits[:n, 0].float()).cpu().numpy()
        return maps, grid[:n].float().cpu().numpy() if grid is not None else None

    def distance(self, image: np.ndarray) -> np.ndarray:
        """Distance map float32 [H, W] of one image float32 [3, H, W] at the model's scale, its windows batched."""
        plan = self.plan_image(image)
        step = self.micro_batch(*plan.key)
        return plan.merge(map_ for i in range(0, len(plan.windows), step) for map_ in self.predict(plan.windows[i:i + step])[0])

    def segment(self, image: np.ndarray) -> np.ndarray:
        """The labels that `look` gives."""
        return self.look(image)[0]

    def look(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(cells of any size, int32 [H, W], distance map float32 [H, W]) of one image float32 [3, H, W] at the model's scale, at
        that resolution.

        `min_area_px` counts pixels of images as they are, so it says nothing here: scales are estimated from this.
        """
        distance = self.distance(image)
        return self.cells(distance, image.shape[1:], min_area_px=0), distance

    def cells(self, distance: np.ndarray, out_shape: tuple[int, int], *, min_area_px: int | None = None) -> np.ndarray:
        """Label image int32 [Y, X], ids 1..n, of a distance map [H, W]: resampled to `out_shape` (Y, X), then a watershed there.
        `min_area_px`: default the one that this was made with.

        Raises ItemError `nonfinite` when the network gave values that are no numbers.
        """
        if not np.isfinite(distance).all():
            raise ItemError("nonfinite", "the distance map has values that are no numbers",
                            todo="use precision float32; the image's values may be too large for the network")
        # clipped: the sum of a blend's weights is 1 but for the last bit
        at_input = np.clip(resample(distance[None], tuple(out_shape))[0], 0, 1)
        smallest = self.min_area_px if min_area_px is None else min_area_px
        return instances(at_input, peak=self.peak, fill=self.fill, markers=self.markers, h=self.marker_height, min_area=smallest)

    def cell_features(self, tokens: np.ndarray, labels: np.ndarray, scale: float, ids: np.ndarray) -> np.ndarray:
        """Mean token float32 [n, D] of each of the cells `ids`, see `cell_tokens.mean_tokens`. `tokens` [D, h, w] of the image
        at `scale` times the resolution of `labels` [Y, X]."""
        return mean_tokens(tokens, labels, self.patch, scale, ids)
