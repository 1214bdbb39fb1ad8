//! Where a tensor of a name stands: what is asked millions of times of a checkpoint with a tensor for
//! every expert's every projection.

use std::hash::{BuildHasher, RandomState};

/// Numbers of things with names, found by name. Open addressing in a table at most half full; the
/// hash is keyed, as names are the file's.
pub(super) struct Places {
    /// Numbers plus one, 0 where there is none.
    slots: Box<[u32]>,
    keys: RandomState,
}

impl Places {
    /// Of names that differ, in the order of their numbers.
    pub(super) fn new<'n>(names: impl ExactSizeIterator<Item = &'n str>) -> Self {
        let mut slots = vec![0; (2 * names.len()).next_power_of_two()].into_boxed_slice();
        let keys = RandomState::new();
        for (name, number) in names.zip(1u32..) {
            let mut slot = keys.hash_one(name) as usize % slots.len();
            while slots[slot] != 0 {
                slot = (slot + 1) % slots.len();
            }
            slots[slot] = number;
        }
        Self { slots, keys }
    }

    /// The number of the thing called `name`, if there is one; `is_it` says whether a number's is.
    pub(super) fn find(&self, name: &str, is_it: impl Fn(usize) -> bool) -> Option<usize> {
        let first = self.keys.hash_one(name) as usize % self.slots.len();
        let slots = self.slots[first..].iter().chain(&self.slots[..first]);
        slots
            .take_while(|number| **number != 0)
            .map(|number| *number as usize - 1)
            .find(|number| is_it(*number))
    }
}

#[cfg(test)]
mod tests {
    use super::Places;

    #[test]
    fn every_name_is_found_and_no_other() {
        for count in [0, 1, 2, 3, 1000] {
            let names: Vec<String> = (0..count).map(|i| format!("model.layers.{i}")).collect();
            let places = Places::new(names.iter().map(String::as_str));
            let find = |name: &str| places.find(name, |number| names[number] == name);
            for (number, name) in names.iter().enumerate() {
                assert_eq!(find(name), Some(number));
            }
            assert_eq!((find("model.layers."), find("")), (None, None));
        }
    }
}
