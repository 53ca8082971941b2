"""Triton kernels, one file per family, kernel and launcher side by side.  Imported when first called."""
