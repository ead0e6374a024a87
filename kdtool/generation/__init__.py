"""Sampling in batches with key/value caches: from one model, or from a student that its teacher repairs.

In interleaved sampling (SKD) the student proposes each token; it stays if it is among the K largest
raw logits of the teacher, else a draw from the teacher replaces it. Every draw belongs to a row and a
position of the generated text, so the block form (the student drafts some tokens, the teacher scores
them in one pass, what follows the first rejected one is thrown away) gives the tokens of a loop over
single tokens, whatever the size of the blocks and whichever rows are sampled together. Rows that are
done leave the batch once they are half of it.

What a model is given before it writes is tokens to go on from: the prompt of a causal model; of an
encoder-decoder what its decoder begins with, beside a source that its encoder has read.
"""

from kdtool.generation._draws import Warp, accepted, draw, uniforms
from kdtool.generation._encoder_decoder import EncoderDecoder, Source, in_step
from kdtool.generation._scorers import CachedModel, Mixture, Scorer
from kdtool.generation._writing import Generated, Interleaving, StopStrings, generate

__all__ = [
    "CachedModel",
    "EncoderDecoder",
    "Generated",
    "Interleaving",
    "Mixture",
    "Scorer",
    "Source",
    "StopStrings",
    "Warp",
    "accepted",
    "draw",
    "generate",
    "in_step",
    "uniforms",
]
