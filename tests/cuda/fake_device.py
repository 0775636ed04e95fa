"""A Device on the CPU: npclip's own, on fake_cupy, without the compiler.

Kernels run on the shim. Graphs, streams and memory are those of fake_cupy.
"""

from cuda import fake_cupy

from npclip.cuda_device import Device

XP = fake_cupy.module()
FakeArray = fake_cupy.ndarray
on_device = XP.asarray  # in memory of its own


class FakeDevice(Device):
    """Device 0."""

    can_time = False

    def __init__(self, capability=(8, 0)):
        self.ordinal, self.xp, self.handle = 0, XP, XP.cuda.Device(0)
        self.name, self.capability = "fake", capability
        self._start()
        self.launches = []

    def run(self, launch):
        self.launches.append(launch._replace(arguments=()))  # which keeps no memory alive
        super().run(launch)

    def _function(self, kernel):
        if kernel not in self._functions:
            self._functions[kernel] = fake_cupy.Function(XP.gpus, kernel)
        return self._functions[kernel]
