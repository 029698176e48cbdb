"""Networks as files that other programs run: StableHLO, ONNX, a page for browsers."""
