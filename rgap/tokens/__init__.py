"""Vision transformers: the gradient of learned position embeddings gives every patch by one least-squares solve."""

from rgap.tokens.embedding import PatchEmbedding, recognise
from rgap.tokens.reconstruct import reconstruct_tokens

__all__ = ["PatchEmbedding", "recognise", "reconstruct_tokens"]
