//! How much memory there is, so that what would not fit is refused before it is tried.

use moe_runner::{Error, Result};

use crate::report::units;

/// Bytes that this process may still allocate, as far as Linux tells: what the machine has left,
/// and what the control group has left.
pub(crate) fn available() -> Option<usize> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let machine =
        line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)?;
    let number = |file: &str| {
        let text = std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?;
        text.trim().parse::<usize>().ok()
    };
    let group = number("memory.max").zip(number("memory.current"));
    Some(group.map_or(machine, |(most, used)| machine.min(most.saturating_sub(used))))
}

/// Refuses what needs more memory than there is.
pub(crate) fn ensure(bytes: usize, what: &str, instead: &str) -> Result<()> {
    if let Some(available) = available()
        && bytes > available
    {
        return Err(Error::input(
            "out of memory",
            format!(
                "{what} needs {}, and {} are available; {instead}",
                units::bytes(bytes),
                units::bytes(available)
            ),
        ));
    }
    Ok(())
}
