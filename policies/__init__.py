"""Models, and everything that must be the same in training and serving. Imports torch; import it lazily on a robot PC."""
