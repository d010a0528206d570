"""The errors a caller can act on.  What else escapes is a bug of ours; but `ops`, whose callers are networks,
may raise ValueError for tensors that do not belong together."""


class FlashTalkError(Exception):
    """Base of every error this package raises on purpose; its text is one line a user can act on."""


class InputError(FlashTalkError):
    """Something the user gave cannot be used: an image, a sound, a size, an option, an output path."""


class CheckpointError(FlashTalkError):
    """A model folder is incomplete, has wrong shapes, or holds something other than plain weights."""


class OutputError(FlashTalkError):
    """The result could not be written (a full disk, say); what was written before stays playable."""
