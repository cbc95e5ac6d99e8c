"""What all stages of planning speak: nodes with channels on a grid of sites, reading each other through affine references.

A *site* is a position (i, j) of a node's grid; sequences are a grid of one row, a vector is one site. Every value of the
graph is a vector of channels at a site. All dependence between nodes is a `Ref` (refs.py): "for my site (i, j) read these
channels of that node at floor(((i, j) * mul + off) / div)". That is the regular form that every executor runs.

A kind of node is one file and one class (node.py says what it must answer): sources.py, taps.py, maps.py, lookup.py.
"""
