"""A trained network as a file that is served without this project: StableHLO, ONNX."""
