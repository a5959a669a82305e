"""The command `gyro`: verbs that import what they need when they are called."""
