//! Libraries of the system as they are: C's types and functions, loaded at run time, and no opinion on their use.

pub(crate) mod verbs;
