"""What a trained network is used for: prediction, and files for ONNX, StableHLO and PyTorch.

Imports training/. Start at predictor.py.
"""
