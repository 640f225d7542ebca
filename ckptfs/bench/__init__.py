"""Lazy against eager on a shaped link: the link emulator (channel, link), and what measures over it."""
