"""Which pictures a run gets: from run folders to files.

run folder -> subject (model, image) -> pictures -> PNG, SVG, GIF

subject      a model with its weights, and an image as it sees it
contrast     the strategies set up side by side on the same weights
album        every picture of one run or several
"""

from fambav.gallery.album import Picture, drawn, every, names_of
from fambav.gallery.subject import Source, Subject, subjects

__all__ = ["Picture", "Source", "Subject", "drawn", "every", "names_of", "subjects"]
