//! What the configuration class of each family says where `config.json` says nothing.
//!
//! `classes.json` is recorded from the library that defines the families; `scripts/families/record.py`
//! makes it, and says what its keys mean.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::Value;

use crate::checkpoint::Config;

/// The recorded classes, as they stand in the repository.
const RECORDED: &str = include_str!("classes.json");

/// What a class says.
#[derive(Clone, Debug, Default)]
pub(super) struct Class {
    /// Values of keys that are absent.
    pub values: Option<Config>,
    /// Values of keys that are written as `null`, where that is not none at all.
    pub null: Option<Config>,
    /// Keys that must not be `null`.
    refused: BTreeSet<String>,
    /// Other spellings that the class accepts, and the keys that they stand for.
    aliases: BTreeMap<String, String>,
    /// How many layers are dense before the first with experts, where no key says so.
    pub dense: Option<usize>,
}

impl Class {
    /// The class of models of this type; one that says nothing where none is recorded.
    pub(super) fn of(model_type: &str) -> &'static Self {
        static NONE: LazyLock<Class> = LazyLock::new(Class::default);
        CLASSES.get(model_type).unwrap_or(&NONE)
    }

    /// Whether a class of models of this type is recorded.
    pub(super) fn is_recorded(model_type: &str) -> bool {
        CLASSES.contains_key(model_type)
    }

    /// Whether the class reads `key`.
    pub(super) fn reads(&self, key: &str) -> bool {
        self.aliases.contains_key(key)
            || self.aliases.values().any(|of| of == key)
            || self.refused.contains(key)
            || self.values.as_ref().is_some_and(|values| values.get(key).is_some())
    }

    /// Another spelling of one of `keys` that `has` knows.
    pub(super) fn other_spelling(
        &'static self,
        keys: &[&str],
        has: impl Fn(&str) -> bool,
    ) -> Option<&'static str> {
        let pairs = self.aliases.iter().flat_map(|(a, b)| [(a, b), (b, a)]);
        let mut others = pairs.filter(|(_, of)| keys.contains(&of.as_str()));
        others.find(|(other, _)| has(other)).map(|(other, _)| other.as_str())
    }

    /// Whether a `null` at `key` is an error.
    pub(super) fn refuses_null(&self, key: &str) -> bool {
        self.refused.contains(key)
    }
}

#[derive(Deserialize)]
struct Document {
    classes: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "as")]
    same: Option<String>,
    #[serde(default)]
    values: Value,
    #[serde(default)]
    null: Value,
    #[serde(default)]
    refused: BTreeSet<String>,
    #[serde(default)]
    aliases: BTreeMap<String, String>,
    dense: Option<usize>,
}

static CLASSES: LazyLock<BTreeMap<String, Class>> = LazyLock::new(|| {
    let Document { classes } = serde_json::from_str(RECORDED).unwrap_or_else(|error| {
        unreachable!("classes.json is part of the program, and tested: {error}")
    });
    let entry = |name: &str| {
        let first = &classes[name];
        first.same.as_ref().and_then(|same| classes.get(same)).unwrap_or(first)
    };
    classes.keys().map(|name| (name.clone(), entry(name).class())).collect()
});

impl Entry {
    fn class(&self) -> Class {
        let part = |value: &Value| {
            value.is_object().then(|| Config::new(Path::new("classes.json"), value.clone()))
        };
        Class {
            values: part(&self.values),
            null: part(&self.null),
            refused: self.refused.clone(),
            aliases: self.aliases.clone(),
            dense: self.dense,
        }
    }
}
