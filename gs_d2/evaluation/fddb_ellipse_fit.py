"""How a rectangle becomes an ellipse: FDDB's annotations fitted by dev/fit_fddb_ellipse.py."""

# (major radius, minor radius) = RADII @ (width, height); the centre is that of the rectangle.
RADII = ((0.052406, 0.533432), (0.520335, 0.026417))
ANGLE = 1.555771  # of the major radius, radians from the x axis
