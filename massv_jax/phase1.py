"""Phase 1: the projector learns to show images to a language model that does not change.

arXiv 2505.10526 gives the roles (only the projector is trained, on captions of LCS-558K); the
values are LLaVA-1.5's, since the text of the paper was not to be had (docs/massv.md).
"""

TRAINABLE = (r"projector/.*",)
