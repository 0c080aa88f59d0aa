"""Vision Mamba training made fast by cross-layer token fusion."""

__version__ = "0.1.0"
