"""`core-seg` and `python -m lab`; the one place where lab reaches up, and only when run as a program."""


def main() -> None:
    """Run the command line."""
    from apps.cli import main as run

    raise SystemExit(run())


if __name__ == "__main__":
    main()
