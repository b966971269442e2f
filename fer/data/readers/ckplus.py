"""CK+48: the last three frames of each sequence of CK+ (Lucey et al. 2010), cropped to 48x48, in class folders."""

from dataclasses import replace

from fer.data.found import Found
from fer.data.readers import folders
from fer.data.source import Source, Wanted

CLASSES = ("happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
SUBJECT = r"(S\d+)_"  # as in S010_004_00000017.png


def read(found: Found, wanted: Wanted) -> Source:
    """Read class folders, with the subject that file names begin with. Raises UserError as `folders.read_named`."""
    return folders.read_named(found, replace(wanted, subject_pattern=wanted.subject_pattern or SUBJECT), CLASSES)
