"""What the user can mend: one sentence that names the place and the mend, and exit code 2."""

import errno


class UserError(ValueError):
    """Something that the user can mend; its text says what is wrong and how to mend it."""


_MENDS = {
    errno.ENOSPC: "there is no space left on the device; free some, then run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space, then run the same command again",
    errno.EFBIG: "the file would be larger than is allowed here; raise the limit, then run the same command again",
    errno.EROFS: "the file system is read-only; pass another --output-dir",
    errno.EACCES: "permission is denied; change the permissions, or pass another path",
    errno.EPERM: "that is not permitted here; pass another path",
    errno.ENOTDIR: "a part of this path is a file, not a directory; pass another path",
    errno.EISDIR: "this is a directory where a file is needed; pass another path",
    errno.EEXIST: "a file stands where a directory is needed; pass another path",
    errno.ENOENT: "there is no such file or directory; pass another path",
    errno.ENAMETOOLONG: "the name is too long; pass a shorter path",
    errno.ELOOP: "the path has a loop of symbolic links; pass another path",
}


def sentence(error: OSError) -> str:
    """One sentence on an error of files or of the network: the place and the mend."""
    place = f"{error.filename}: " if error.filename is not None else ""
    text = _MENDS.get(error.errno or 0) or error.strerror or str(error)
    return f"{place}{text}.".replace("..", ".")
