"""An array of a library that knows DLPack and nothing else."""


class DLPackOnly:
    """where: as DLPack numbers devices, if not where the array lies; nobody can read it there."""

    def __init__(self, array, where=None):
        self.array, self.where = array, where

    def __dlpack__(self, **options):
        if self.where:
            raise BufferError("not on the CPU")
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.where or self.array.__dlpack_device__()
