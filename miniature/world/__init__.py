"""Procedural scenes with captions, questions and answers, ground truth and a scorer."""

from miniature.world.captions import STYLES, describe
from miniature.world.parsing import ParsedObject, ParsedScene, parse
from miniature.world.qa import QA, questions
from miniature.world.rendering import render, render_image
from miniature.world.scenes import Background, Object, Scene, sample_crowd, sample_scene
from miniature.world.scoring import aggregate, score, scorer

__all__ = [
    "QA",
    "STYLES",
    "Background",
    "Object",
    "ParsedObject",
    "ParsedScene",
    "Scene",
    "aggregate",
    "describe",
    "parse",
    "questions",
    "render",
    "render_image",
    "sample_crowd",
    "sample_scene",
    "score",
    "scorer",
]
