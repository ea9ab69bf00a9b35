"""What devices can do, from their vendors' data sheets (sources in docs/parallel.md)."""

from dataclasses import dataclass

from llm.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One device and its links; bandwidths are bytes per second in one direction.

    Args:
        name: of the device.
        memory: bytes on the device, as the vendor counts: GB of 10**9.
        half: dense half-precision FLOP/s.
        single: FLOP/s of float32 products (TF32 where the device has it).
        memory_bandwidth: of the device's memory.
        inside: of links between the devices of a machine, for each device.
        outside: of the network between machines, for each device.
        host: of the link to host memory.
    """

    name: str
    memory: float
    half: float
    single: float
    memory_bandwidth: float
    inside: float
    outside: float
    host: float


_ALL = (
    Hardware("H100", 80e9, 989e12, 494e12, 3.35e12, 450e9, 50e9, 64e9),
    Hardware("H200", 141e9, 989e12, 494e12, 4.8e12, 450e9, 50e9, 64e9),
    Hardware("H800", 80e9, 989e12, 494e12, 3.35e12, 200e9, 50e9, 64e9),
    Hardware("H20", 96e9, 148e12, 74e12, 4.0e12, 450e9, 50e9, 64e9),
    Hardware("A100", 80e9, 312e12, 156e12, 2.039e12, 300e9, 25e9, 32e9),
    Hardware("A800", 80e9, 312e12, 156e12, 2.039e12, 200e9, 25e9, 32e9),
    Hardware("A100-40", 40e9, 312e12, 156e12, 1.555e12, 300e9, 25e9, 32e9),
    Hardware("L40S", 48e9, 362e12, 183e12, 0.864e12, 32e9, 12.5e9, 32e9),
    Hardware("V100", 32e9, 125e12, 15.7e12, 0.9e12, 150e9, 12.5e9, 16e9),
)
DEVICES = {device.name: device for device in _ALL}


def hardware(name: str) -> Hardware:
    """Return a device by its name.

    Raises:
        UserError: with the names there are.
    """
    if name not in DEVICES:
        raise UserError(f"gpu={name!r} is not one of {', '.join(DEVICES)}")
    return DEVICES[name]
