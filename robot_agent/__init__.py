"""The robot PC's agent: drivers, cameras, teleoperators, the safety core and RobotService. No torch."""
