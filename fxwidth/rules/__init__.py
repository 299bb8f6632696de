"""Op rules, one module per family; importing this package fills the table."""

from fxwidth.rules import (  # noqa: F401
    attention,
    boxes,
    contraction,
    copies,
    fourier,
    indexing,
    matrices,
    movement,
    normalization,
    pointwise,
    quantization,
    recurrent,
    reduction,
    slicing,
    spatial,
    views,
    writes,
)
