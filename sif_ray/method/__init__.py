"""The SIFThinker method (arXiv 2508.06259) as pure functions of text, boxes and arrays.

This folder is the paper: it needs NumPy and SciPy, imports no other part of the package, and every function that
differs between the released method and its repair takes a :class:`sif_ray.method.profile.Profile`.

Frames: a box is ``(x1, y1, x2, y2)`` as fractions of the *image* unless a name says padded square or pixels.
Depth: relative to its image, 0 = nearest pixel, 1 = farthest.
"""
