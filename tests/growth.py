"""How long a work takes as its input grows: a law that no slow machine breaks, unlike a limit in seconds."""

import time


def assert_linear(work, size: int):
    """`work(n)` for n = `size` takes about 16 times the processor's time of n = `size` / 16; quadratic work 256 times.

    Whatever takes less than 2 s is taken for linear: its times are too short to be compared.
    """
    def seconds(n: int) -> float:
        start = time.process_time()
        work(n)
        return time.process_time() - start
    # What is done once, such as the compilation of patterns, is not measured.
    work(size // 256)
    short, long = seconds(size // 16), seconds(size)
    assert long < 2 + 100 * short, f"{size // 16:,}: {short:.2f} s, {size:,}: {long:.2f} s of the processor's time"
