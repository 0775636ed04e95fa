"""How well a model tells classes of images apart: by their names, or by a trained classifier.

from npclip.evaluation import evaluate, linear_probe

evaluate(model, "photos")      # photos/cat/1.jpg, photos/dog/2.jpg, ...: zero_shot.py
linear_probe(...)              # on features of any origin: probe.py
recall(images, texts, pairs)   # of retrieval, on features: retrieval.py
"""

from .probe import Probe, linear_probe, probe_images
from .retrieval import recall
from .zero_shot import Evaluation, evaluate

__all__ = ["Evaluation", "Probe", "evaluate", "linear_probe", "probe_images", "recall"]
