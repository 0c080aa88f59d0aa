"""What happens to files on disks."""


def flipped(raw, draw):
    at = draw.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :]


def truncated(raw, draw):
    return raw[: draw.randrange(len(raw))]


def zeroed(raw, draw):
    while True:  # a page that is zero already would be no damage
        at = draw.randrange(len(raw) // 4096) * 4096
        if any(raw[at : at + 4096]):
            return raw[:at] + bytes(min(4096, len(raw) - at)) + raw[at + 4096 :]
