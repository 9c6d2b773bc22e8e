//! What has been found.

use std::fmt;

use clap::ValueEnum;
use serde_json::{Value, json};

/// What a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Topic {
    /// What hop 1 may run on between nodes.
    Rdma,
    /// CUDA devices.
    Gpu,
    /// Memory that is pinned, shared, huge, limited.
    Memory,
    /// Processors.
    Cores,
    /// Interfaces and ports.
    Network,
    /// What the environment says of this process's place in a job.
    Launcher,
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rdma => "rdma",
            Self::Gpu => "gpu",
            Self::Memory => "memory",
            Self::Cores => "cores",
            Self::Network => "network",
            Self::Launcher => "launcher",
        })
    }
}

/// How it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// As it should be.
    Ok,
    /// It works, or may not matter here.
    Warning,
    /// What needs it can't be done.
    Missing,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Missing => "missing",
        })
    }
}

/// One thing that has been looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    /// What it is about.
    pub topic: Topic,
    /// What has been looked at.
    pub name: String,
    /// How it is.
    pub state: State,
    /// What there is.
    pub value: String,
    /// What to do about it, where it is not as it should be.
    pub advice: Option<String>,
    /// For programs: what `value` says, in parts.
    pub details: Value,
}

impl Finding {
    /// All is well.
    pub fn ok(topic: Topic, name: impl Into<String>, value: impl Into<String>) -> Self {
        let (name, value) = (name.into(), value.into());
        Self { topic, name, state: State::Ok, value, advice: None, details: Value::Null }
    }

    /// It might be better, by this advice.
    pub fn warn(self, advice: impl Into<String>) -> Self {
        Self { state: State::Warning, advice: Some(advice.into()), ..self }
    }

    /// It is not there, or of no use, but for this advice.
    pub fn missing(self, advice: impl Into<String>) -> Self {
        Self { state: State::Missing, advice: Some(advice.into()), ..self }
    }

    /// The same, with a warning if there is one.
    pub fn warn_if(self, is_so: bool, advice: &str) -> Self {
        if is_so { self.warn(advice) } else { self }
    }

    /// The same, with parts for programs.
    pub fn with(self, details: Value) -> Self {
        Self { details, ..self }
    }

    /// As an object.
    pub fn json(&self) -> Value {
        json!({
            "name": self.name, "state": self.state.to_string(), "value": self.value, "advice": self.advice,
            "details": self.details,
        })
    }
}
