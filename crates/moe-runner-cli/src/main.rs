//! The command `moe-runner`.

fn main() {}
