//! Waiting for what is no exchange of a group, such as signals in a device's memory, with an eye on its ranks.

use std::fmt::Display;
use std::thread;
use std::time::{Duration, Instant};

use super::{At, Communicator, Place, Step, failure};
use crate::{Error, Result};

/// Waiting for something that other ranks do, somewhere in a pass.
pub struct Watch<'a> {
    /// The group that knows of ranks that have failed.
    pub group: &'a dyn Communicator,
    /// How long at most.
    pub timeout: Duration,
    /// Where this rank is.
    pub at: At<'a>,
}

/// Who is waited for, as far as that is known when time is up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Awaited {
    /// The rank.
    pub rank: usize,
    /// Layer and step in which this one waits for it.
    pub at: (String, Step),
    /// Layer and step that it came to last, if it ever came to one.
    pub seen: Option<(String, Step)>,
}

impl Watch<'_> {
    /// Waits until `done`, which is polled; `late` is asked for whom when time is up.
    ///
    /// # Errors
    /// [`Error::Communication`] that names the rank, as every group's ([`comm`](super)): a rank that has failed, or does not
    /// come; what `done` returns. All ranks of the group are told.
    pub fn until<E: Display>(
        &self,
        mut done: impl FnMut() -> Result<bool, E>,
        late: impl FnOnce() -> Option<Awaited>,
    ) -> Result<()> {
        let since = Instant::now();
        let mut looked = since;
        loop {
            match done() {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(cause) => return Err(self.fail(&cause.to_string())),
            }
            if looked.elapsed() >= Duration::from_millis(1) {
                looked = Instant::now();
                self.group.check()?;
                if since.elapsed() >= self.timeout {
                    return Err(self.in_vain(late()));
                }
            }
            match since.elapsed() < Duration::from_millis(5) {
                true => thread::yield_now(),
                false => thread::sleep(Duration::from_micros(50)),
            }
        }
    }

    /// Tells the others of a `cause`, and returns the error of all: the first.
    pub fn fail(&self, cause: &str) -> Error {
        self.fail_at(cause, self.at)
    }

    fn fail_at(&self, cause: &str, at: At<'_>) -> Error {
        let cause = format!("{cause}, in {}", Place::from(at));
        self.group.abort(&cause);
        self.group.check().err().unwrap_or_else(|| failure(self.group.rank(), &cause))
    }

    fn in_vain(&self, late: Option<Awaited>) -> Error {
        let waited = self.timeout.as_secs_f32();
        let Some(Awaited { rank, at: (layer, step), seen }) = late else {
            return self.fail(&format!("waited {waited} s for the others"));
        };
        let seen = match &seen {
            Some((layer, step)) => {
                format!("last seen at {}", Place::from(At::new(layer, *step)))
            }
            None => "which came to no meeting".to_owned(),
        };
        let cause = format!("waited {waited} s for rank {rank}, {seen}");
        self.fail_at(&cause, At::new(&layer, step))
    }
}
