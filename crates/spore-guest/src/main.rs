//! PID 1 of a VM.

fn main() {}
