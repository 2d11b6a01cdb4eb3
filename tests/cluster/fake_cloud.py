"""A cloud on this machine: Ray's own fake node provider, with nodes that take their time, and a log of what it did.

Loaded by Ray's autoscaler through `provider: {type: external, module: tests.cluster.fake_cloud.FakeCloud}`.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE


class FakeCloud(FakeMultiNodeProvider):
    """`provider.start_s`: seconds from the request to the node. `provider.log`: a file of one JSON line per event."""

    def _create_node_with_resources_and_labels(self, node_config: Any, tags: dict[str, str], count: int,
                                               resources: Any, labels: Any) -> None:
        self._tell("asked", tags[TAG_RAY_USER_NODE_TYPE])
        time.sleep(self.provider_config["start_s"])
        super()._create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
        self._tell("started", tags[TAG_RAY_USER_NODE_TYPE])

    def terminate_node(self, node_id: str) -> None:
        """End a node."""
        kind = self.node_tags(node_id)[TAG_RAY_USER_NODE_TYPE]
        super().terminate_node(node_id)
        self._tell("ended", kind)

    def _tell(self, event: str, node_type: str) -> None:
        line = json.dumps({"event": event, "type": node_type, "time": time.time()}) + "\n"
        file = os.open(self.provider_config["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)
