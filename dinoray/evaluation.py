"""How good are masks? Pairs of label images -> scores, intervals, files."""
