"""Shell completion from the registry listings; imports nothing heavy."""

from collections.abc import Callable


def names(kind: str) -> Callable[[str], list[str]]:
    """Make a completer for the plug-ins of one kind, such as `methods`."""

    def completer(incomplete: str) -> list[str]:
        from kdtool.registry import ALL

        return [name for name in ALL[kind].names() if name.startswith(incomplete)]

    return completer


def plugins(incomplete: str) -> list[str]:
    """Complete the name of a plug-in of any kind."""
    from kdtool.registry import ALL

    return sorted({name for registry in ALL.values() for name in registry.names() if name.startswith(incomplete)})


def benchmarks(incomplete: str) -> list[str]:
    """Complete the name of a benchmark."""
    from kdtool import benchmarks as shipped

    return [name for name in shipped.names() if name.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """Complete the name of a recipe."""
    from kdtool import recipes as shipped

    return [name for name in shipped.names() if name.startswith(incomplete)]


def devices(incomplete: str) -> list[str]:
    """Complete the kinds of device."""
    return [name for name in ("auto", "cpu", "cuda", "mps") if name.startswith(incomplete)]
