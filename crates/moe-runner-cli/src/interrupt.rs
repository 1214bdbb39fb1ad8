//! Ctrl-C and a polite kill: what must be cleaned up and said is, then the process ends. Work that ends
//! in order by itself is only asked to; asked again, the process ends at once.

use std::cell::RefCell;
use std::io::{IsTerminal, stderr};
use std::ops::ControlFlow;
use std::process::exit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::failure::{self, INTERRUPTED};

type Last = Box<dyn FnMut() + Send>;

/// What is cleaned up before the process ends, the latest first.
static CLEANING: Mutex<Vec<Last>> = Mutex::new(Vec::new());

/// What an interrupted run says, where that is more than that it was.
static WORDS: Mutex<Option<Last>> = Mutex::new(None);

/// Errors are objects, too.
static JSON: AtomicBool = AtomicBool::new(false);

/// The work ends by itself when asked.
static ORDERLY: AtomicBool = AtomicBool::new(false);

/// It was asked to.
static ASKED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Set by whoever has called this thread's work as a function.
    static STOP: RefCell<Option<Arc<AtomicBool>>> = const { RefCell::new(None) };
}

/// From now on, interruptions come here.
pub(crate) fn watch(json: bool) {
    JSON.store(json, Ordering::Release);
    // Another handler in this process can only be this one; without it, an interruption ends the
    // process as ever.
    let _ = ctrlc::set_handler(|| {
        if ORDERLY.load(Ordering::Acquire) && !ASKED.swap(true, Ordering::AcqRel) {
            eprintln!("stopping; once more to stop at once");
            return;
        }
        if stderr().is_terminal() {
            // after the bar, and what the terminal shows of the key
            eprintln!();
        }
        // what is being said already is not said again
        if let Ok(mut words) = WORDS.try_lock() {
            match words.as_mut() {
                Some(words) => words(),
                None => {
                    let error = moe_runner::Error::Interrupted.into();
                    failure::print(&error, JSON.load(Ordering::Acquire));
                }
            }
        }
        end(INTERRUPTED)
    });
}

/// Ends the process, after all that is to be cleaned up.
pub(crate) fn end(status: u8) -> ! {
    // one that is ending already, or that panicked, has no more to do
    if let Ok(mut cleaning) = CLEANING.try_lock() {
        cleaning.iter_mut().rev().for_each(|last| last());
    }
    exit(status.into())
}

/// Before the process ends without a return from its commands, this is done, on any thread.
pub(crate) fn before_the_end(last: impl FnMut() + Send + 'static) {
    if let Ok(mut all) = CLEANING.lock() {
        all.push(Box::new(last));
    }
}

/// A temporary folder, removed when it is dropped, and where the process ends without.
pub(crate) fn temporary() -> Result<TempDir> {
    let folder = TempDir::with_prefix("moe-runner-")
        .context("cannot make a temporary folder; TMPDIR says where one can be")?;
    let path = folder.path().to_owned();
    before_the_end(move || drop(std::fs::remove_dir_all(&path)));
    Ok(folder)
}

/// An interrupted run says this, on another thread.
pub(crate) fn last_words(words: impl FnMut() + Send + 'static) {
    if let Ok(mut last) = WORDS.lock() {
        *last = Some(Box::new(words));
    }
}

/// From now on, the work asks [`Asked`] and ends by itself.
pub(crate) fn ends_in_order() {
    ORDERLY.store(true, Ordering::Release);
}

/// From now on, the work of this thread asks [`Asked`], too: whoever has called it as a function sets
/// `stop` to end it.
pub(crate) fn stop_when(stop: Arc<AtomicBool>) {
    STOP.set(Some(stop));
}

/// Whether work is to go on.
pub(crate) struct Asked(Option<Arc<AtomicBool>>);

impl Asked {
    /// For the work of this thread, to ask on any.
    pub(crate) fn here() -> Self {
        Self(STOP.with_borrow(Clone::clone))
    }

    /// Asks.
    pub(crate) fn to_stop(&self) -> ControlFlow<()> {
        let stop = self.0.as_ref().is_some_and(|stop| stop.load(Ordering::Acquire));
        match stop || ASKED.load(Ordering::Acquire) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    /// Goes on, or ends with an error.
    pub(crate) fn go_on(&self) -> moe_runner::Result<()> {
        match self.to_stop() {
            ControlFlow::Break(()) => Err(moe_runner::Error::Interrupted),
            ControlFlow::Continue(()) => Ok(()),
        }
    }
}
