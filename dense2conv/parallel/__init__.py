"""Everything that knows of ranks: the mesh, its collectives, the pipeline and the engines."""

from dense2conv.parallel.mesh import Mesh, ParallelConfig, open_mesh

__all__ = ["Mesh", "ParallelConfig", "open_mesh"]
