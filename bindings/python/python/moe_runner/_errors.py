"""What goes wrong. Every message is one line that says what, where, and what to do."""


class Error(RuntimeError):
    """Something moe-runner could not do."""


class CheckpointError(Error):
    """A checkpoint is missing, wrong, incomplete, or of an architecture that is not known."""


class InputError(Error, ValueError):
    """An argument does not fit: its shape, dtype, device, name, or values."""


class NoKernelError(Error):
    """No kernel can run this, or the named one cannot; the message gives every reason."""
