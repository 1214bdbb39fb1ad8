//! The pauses of one wait: pure spinning first, then with the processor offered to other threads.

use std::time::Duration;

/// How long a worker without work stays awake: longer than the serial work between the regions of
/// a forward pass, shorter than anyone would notice on an idle machine.
const AWAKE: Duration = Duration::from_micros(80);

/// How long a thread spins before it begins to give its processor to others between two looks: the
/// one it waits for may be among them.
#[cfg(not(loom))]
const SPIN: Duration = Duration::from_micros(10);

/// Looks between two readings of the clock.
#[cfg(not(loom))]
const LOOKS: u32 = 64;

#[cfg(not(loom))]
pub(super) struct Wait {
    since: std::time::Instant,
    waited: Duration,
    looks: u32,
}

#[cfg(not(loom))]
impl Wait {
    pub(super) fn new() -> Wait {
        Wait { since: std::time::Instant::now(), waited: Duration::ZERO, looks: 0 }
    }

    /// Between two looks at what is waited for.
    pub(super) fn pause(&mut self) {
        std::hint::spin_loop();
        self.looks += 1;
        if self.looks.is_multiple_of(LOOKS) {
            self.waited = self.since.elapsed();
        }
        if self.waited > SPIN {
            std::thread::yield_now();
            self.waited = self.since.elapsed();
        }
    }

    /// A worker that has waited for so long should sleep.
    pub(super) fn is_long(&self) -> bool {
        self.waited >= AWAKE
    }
}

/// In the model there is no time: workers sleep at once, and every pause lets others go first.
#[cfg(loom)]
pub(super) struct Wait;

#[cfg(loom)]
impl Wait {
    pub(super) fn new() -> Wait {
        Wait
    }

    pub(super) fn pause(&mut self) {
        super::sync::yield_now();
    }

    pub(super) fn is_long(&self) -> bool {
        AWAKE > Duration::ZERO
    }
}
