"""Sample pictures and questions; installed as the default calibration data."""
