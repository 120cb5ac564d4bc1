"""Semi-supervised semantic segmentation and image classification in JAX."""

__version__ = "0.1.0"
