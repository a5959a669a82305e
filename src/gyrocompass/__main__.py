"""`python -m gyrocompass` is `gyro`."""

from gyrocompass.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
