"""Stands in TensorFlow's place while tests run the commands: they must do without it."""

raise ImportError("TensorFlow is blocked here")
