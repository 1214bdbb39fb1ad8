//! Ctrl-C and a polite kill: what must be said or cleaned up is done, then the process ends. Work
//! that ends in order by itself is only asked to; asked again, the process ends at once.

use std::ops::ControlFlow;
use std::process::exit;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// The exit status of an interrupted run, as shells have it.
pub(crate) const INTERRUPTED: u8 = 130;

type Last = Box<dyn FnMut() + Send>;

/// What is done before the process ends, the latest first.
static LAST: Mutex<Vec<Last>> = Mutex::new(Vec::new());

/// The work ends by itself when asked.
static ORDERLY: AtomicBool = AtomicBool::new(false);

/// It was asked to.
static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on, interruptions come here.
pub(crate) fn watch() {
    // Another handler in this process can only be this one; without it, an interruption ends the
    // process as ever.
    let _ = ctrlc::set_handler(|| {
        if ORDERLY.load(Ordering::Acquire) && !ASKED.swap(true, Ordering::AcqRel) {
            eprintln!("stopping; once more to stop at once");
            return;
        }
        // one that is being interrupted again, or that panicked, has no more to say
        if let Ok(mut last) = LAST.try_lock() {
            last.iter_mut().rev().for_each(|last| last());
        }
        exit(INTERRUPTED.into());
    });
}

/// Before the process ends by an interruption, this is done, on another thread.
pub(crate) fn before_the_end(last: impl FnMut() + Send + 'static) {
    if let Ok(mut all) = LAST.lock() {
        all.push(Box::new(last));
    }
}

/// From now on, the work asks [`asked`] and ends by itself.
pub(crate) fn ends_in_order() {
    ORDERLY.store(true, Ordering::Release);
}

/// Whether to go on.
pub(crate) fn asked() -> ControlFlow<()> {
    match ASKED.load(Ordering::Acquire) {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}
