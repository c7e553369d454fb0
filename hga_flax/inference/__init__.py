"""Uses of a trained network: prediction, and export to ONNX, StableHLO and PyTorch.

Imports training/ and the rooms before it. Start at predictor.py.
"""
