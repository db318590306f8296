//! The channel against agents that behave, and agents that do not.
