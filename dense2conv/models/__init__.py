"""Dense networks, built shard by shard."""

from dense2conv.models.dense_stack import DenseLayer, DenseStack, ModelConfig

__all__ = ["DenseLayer", "DenseStack", "ModelConfig"]
