"""Triton kernels of fastgen.ops: launchers that trust their arguments, which `fastgen.ops` has checked."""
