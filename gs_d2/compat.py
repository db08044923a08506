"""The one place that knows that Detectron2 may be missing, or be 0.5 or main.

Modules of gs_d2 that need Detectron2 import this one first, so that its absence is one clear message.
"""

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"gs_d2's detectors need Detectron2, which does not import here ({error}). "
        "Install it with: python tools/install_detectron2.py (gs_d2.ops alone needs only torch)"
    ) from error
