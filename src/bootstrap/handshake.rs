//! How the two ends of a connection come to know that they are of the same job.
//!
//! The rank sends a [`Greeting`] with a fresh nonce; the store answers with its own. The rank proves that it has the
//! job's key by a keyed hash over both greetings, then the store does by one over both greetings and its verdict. So
//! neither can replay what it has heard, and nothing in a greeting or verdict can be changed on the way. What comes
//! later on the connection is neither signed nor encrypted: the network is trusted not to tamper with connections.

use std::fmt;
use std::io::{self, Read, Write};

use super::error::{Agreed, BootstrapError, Refusal};
use super::frame::{decode, decode_error, encode, encode_error, max_error};

/// What goes over the store's connections, together with the library's version: ranks of different ones do not talk.
pub const VERSION: u64 = {
    let parts =
        [env!("CARGO_PKG_VERSION_MAJOR"), env!("CARGO_PKG_VERSION_MINOR"), env!("CARGO_PKG_VERSION_PATCH")];
    (number(parts[0]) * 1000 + number(parts[1])) * 1000 + number(parts[2])
};

const fn number(digits: &str) -> u64 {
    match u64::from_str_radix(digits, 10) {
        Ok(number) => number,
        Err(_) => panic!("cargo's versions are numbers"),
    }
}

/// The first bytes of every connection. Greetings of all versions are alike, so that versions can be compared.
const MAGIC: [u8; 8] = *b"railhop1";

const NONCE_BYTES: usize = 32;
const MAC_BYTES: usize = blake3::OUT_LEN;

/// What the processes of a job share and nobody else has.
#[derive(Clone, PartialEq, Eq)]
pub struct JobKey([u8; blake3::KEY_LEN]);

impl JobKey {
    /// From the job's id, and its secret where it has one. The id alone keeps jobs apart that meet by mistake; against
    /// who can guess it only a secret helps. With a secret, the id still tells this job from older ones.
    pub fn new(secret: Option<&[u8]>, job_id: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("railhop 2026-11 bootstrap store: key of a job");
        // Lengths keep the parts apart; a missing secret is no empty one.
        let secret_len = secret.map_or(u64::MAX, |secret| secret.len() as u64);
        hasher.update(&secret_len.to_le_bytes()).update(secret.unwrap_or_default()).update(job_id.as_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    fn mac(&self, label: &[u8; 8], rank: &Greeting, store: &Greeting, more: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(label).update(&rank.to_bytes()).update(&store.to_bytes()).update(more).finalize()
    }

    /// What proves to the store that a rank has the key.
    fn proof(&self, rank: &Greeting, store: &Greeting) -> blake3::Hash {
        self.mac(b"rank    ", rank, store, &[])
    }

    /// What proves to the rank that `verdict` is that of a store that has the key.
    fn seal(&self, rank: &Greeting, store: &Greeting, verdict: &[u8]) -> blake3::Hash {
        self.mac(b"verdict ", rank, store, verdict)
    }
}

impl fmt::Debug for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JobKey(..)")
    }
}

/// What one end says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Greeting {
    pub version: u64,
    pub layout: u64,
    pub rank: u64,
    pub world_size: u64,
    pub nonce: [u8; NONCE_BYTES],
}

impl Greeting {
    /// The same with a nonce that was never used.
    pub fn fresh(&self) -> Result<Self, BootstrapError> {
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(|error| BootstrapError::Io {
            what: "no random numbers".into(),
            reason: error.to_string(),
        })?;
        Ok(Self { nonce, ..*self })
    }

    fn to_bytes(self) -> Vec<u8> {
        let words = encode(&[self.version, self.layout, self.rank, self.world_size]);
        [&MAGIC[..], &words, &self.nonce].concat()
    }

    fn write(&self, to: &mut impl Write) -> io::Result<()> {
        to.write_all(&self.to_bytes())
    }

    fn read(from: &mut impl Read) -> Result<Self, Stop> {
        let mut magic = [0; MAGIC.len()];
        from.read_exact(&mut magic)?;
        if magic != MAGIC {
            return Err(Stop::Refused(Refusal::NotAStore));
        }
        let mut words = [0; 32];
        from.read_exact(&mut words)?;
        let mut words = decode(&words);
        let mut next = || words.next().unwrap_or_default();
        let (version, layout, rank, world_size) = (next(), next(), next(), next());
        let mut nonce = [0; NONCE_BYTES];
        from.read_exact(&mut nonce)?;
        Ok(Self { version, layout, rank, world_size, nonce })
    }

    /// How `self` differs from `other`, as an error in the eyes of `self`.
    pub fn mismatch(&self, other: &Self) -> Option<BootstrapError> {
        let pairs = [
            (Agreed::Version, self.version, other.version),
            (Agreed::WorldSize, self.world_size, other.world_size),
            (Agreed::Layout, self.layout, other.layout),
        ];
        let (rank, peer) = (self.rank as usize, other.rank as usize);
        pairs
            .into_iter()
            .find(|(_, ours, theirs)| ours != theirs)
            .map(|(what, ours, theirs)| BootstrapError::Mismatch { rank, peer, what, ours, theirs })
    }
}

/// Why a handshake ends before its verdict.
#[derive(Debug)]
pub(super) enum Stop {
    /// The other end is not of this job.
    Refused(Refusal),
    /// The connection has broken, or took too long.
    Broken(io::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refusal) => write!(f, "{refusal}"),
            Self::Broken(error) => write!(f, "{error}"),
        }
    }
}

/// What the store thinks of a rank that has proved itself.
pub(super) type Verdict = Result<(), BootstrapError>;

const REFUSED: u64 = 1;
const VERDICT: u64 = 2;

/// The store's side: reads the greeting of whoever has connected, and lets it prove itself. What it says of itself is
/// true afterwards.
pub(super) fn challenge(
    key: &JobKey,
    own: &Greeting,
    stream: &mut (impl Read + Write),
) -> Result<Greeting, Stop> {
    let rank = Greeting::read(stream)?;
    own.write(stream)?;
    let mut proof = [0; MAC_BYTES];
    stream.read_exact(&mut proof)?;
    // Hashes compare in constant time.
    if key.proof(&rank, own) != proof {
        let _ = stream.write_all(&encode(&[REFUSED, 0]));
        return Err(Stop::Refused(Refusal::Secret));
    }
    Ok(rank)
}

/// The store's last word to a rank that has proved itself.
pub(super) fn conclude(
    key: &JobKey,
    own: &Greeting,
    rank: &Greeting,
    verdict: &Verdict,
    to: &mut impl Write,
) -> io::Result<()> {
    let body = verdict.as_ref().err().map(encode_error).unwrap_or_default();
    let mut bytes = encode(&[VERDICT, body.len() as u64]);
    bytes.extend(&body);
    bytes.extend(key.seal(rank, own, &body).as_bytes());
    to.write_all(&bytes)
}

/// The rank's side, first part: greets and reads what the store says of itself, which is not to be believed yet.
pub(super) fn greet(own: &Greeting, stream: &mut (impl Read + Write)) -> Result<Greeting, Stop> {
    own.write(stream)?;
    Greeting::read(stream)
}

/// The rank's side, second part: proves itself and reads the verdict.
pub(super) fn prove(
    key: &JobKey,
    own: &Greeting,
    store: &Greeting,
    stream: &mut (impl Read + Write),
) -> Result<Verdict, Stop> {
    stream.write_all(key.proof(own, store).as_bytes())?;
    let mut header = [0; 16];
    stream.read_exact(&mut header)?;
    let mut words = decode(&header);
    let len = match (words.next(), words.next()) {
        (Some(REFUSED), _) => return Err(Stop::Refused(Refusal::Secret)),
        // The store's own idea of the world's size counts: it may differ.
        (Some(VERDICT), Some(len)) if len <= max_error(store.world_size.min(1 << 20) as usize) => len,
        _ => return Err(Stop::Refused(Refusal::NotAStore)),
    };
    let mut body = Vec::new();
    stream.take(len).read_to_end(&mut body)?;
    let mut seal = [0; MAC_BYTES];
    stream.read_exact(&mut seal)?;
    if key.seal(own, store, &body) != seal {
        return Err(Stop::Refused(Refusal::Secret));
    }
    match (body.is_empty(), decode_error(&body)) {
        (true, _) => Ok(Ok(())),
        (false, Some(error)) => Ok(Err(error)),
        (false, None) => Err(Stop::Refused(Refusal::NotAStore)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    fn greeting(rank: u64) -> Greeting {
        Greeting { version: 1, layout: 2, rank, world_size: 4, nonce: [0; NONCE_BYTES] }.fresh().unwrap()
    }

    /// Reads from one buffer, writes to another.
    struct Tape<'a>(Cursor<&'a [u8]>, Vec<u8>);

    impl<'a> Tape<'a> {
        fn new(input: &'a [u8]) -> Self {
            Self(Cursor::new(input), Vec::new())
        }
    }

    impl Read for Tape<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.read(buffer)
        }
    }

    impl Write for Tape<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn refused<T>(result: Result<T, Stop>) -> Option<Refusal> {
        match result {
            Err(Stop::Refused(refusal)) => Some(refusal),
            _ => None,
        }
    }

    #[test]
    fn keys_differ_by_secret_and_job() {
        let key = |secret: Option<&str>, job| JobKey::new(secret.map(str::as_bytes), job);
        let keys =
            [key(None, "1"), key(None, "2"), key(Some(""), "1"), key(Some("s"), "1"), key(Some("s1"), "")];
        for (i, a) in keys.iter().enumerate() {
            assert!(keys.iter().skip(i + 1).all(|b| a != b));
        }
        assert_eq!(key(Some("s"), "1"), keys[3]);
        assert_eq!(format!("{:?}", keys[3]), "JobKey(..)");
    }

    #[test]
    fn proofs_hold_for_one_exchange_only() {
        let (key, other) = (JobKey::new(None, "a"), JobKey::new(None, "b"));
        let (rank, store) = (greeting(2), greeting(0));
        let input = |key: &JobKey, nonce: &Greeting| {
            [rank.to_bytes(), key.proof(&rank, nonce).as_bytes().to_vec()].concat()
        };
        let good = input(&key, &store);
        assert_eq!(challenge(&key, &store, &mut Tape::new(&good)).unwrap(), rank);
        // Replayed at another store, or at the same store later.
        let later = greeting(0);
        assert_eq!(refused(challenge(&key, &later, &mut Tape::new(&good))), Some(Refusal::Secret));
        assert_eq!(
            refused(challenge(&key, &store, &mut Tape::new(&input(&other, &store)))),
            Some(Refusal::Secret)
        );
        // A greeting changed on the way.
        for at in MAGIC.len()..rank.to_bytes().len() {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            assert_eq!(refused(challenge(&key, &store, &mut Tape::new(&bytes))), Some(Refusal::Secret));
        }
    }

    #[test]
    fn verdicts_are_believed_only_under_seal() {
        let (key, other) = (JobKey::new(None, "a"), JobKey::new(None, "b"));
        let (rank, store) = (greeting(2), greeting(0));
        for verdict in [Ok(()), Err(BootstrapError::Duplicate { rank: 2 })] {
            let mut bytes = Vec::new();
            conclude(&key, &store, &rank, &verdict, &mut bytes).unwrap();
            assert_eq!(prove(&key, &rank, &store, &mut Tape::new(&bytes)).unwrap(), verdict);
            assert_eq!(refused(prove(&other, &rank, &store, &mut Tape::new(&bytes))), Some(Refusal::Secret));
            let again = greeting(2);
            assert_eq!(refused(prove(&key, &again, &store, &mut Tape::new(&bytes))), Some(Refusal::Secret));
            *bytes.last_mut().unwrap() ^= 1;
            assert_eq!(refused(prove(&key, &rank, &store, &mut Tape::new(&bytes))), Some(Refusal::Secret));
        }
        // A rank's own proof is no seal.
        let echo = [encode(&[VERDICT, 0]), key.proof(&rank, &store).as_bytes().to_vec()].concat();
        assert_eq!(refused(prove(&key, &rank, &store, &mut Tape::new(&echo))), Some(Refusal::Secret));
    }

    #[test]
    fn mismatches_name_what_differs() {
        let (rank, store) = (greeting(2), greeting(0));
        assert_eq!(rank.mismatch(&store), None);
        let other = Greeting { layout: 3, ..store };
        let expected =
            BootstrapError::Mismatch { rank: 2, peer: 0, what: Agreed::Layout, ours: 2, theirs: 3 };
        assert_eq!(rank.mismatch(&other), Some(expected));
        // The version decides what the rest means.
        let other = Greeting { version: 9, ..other };
        assert!(matches!(
            rank.mismatch(&other),
            Some(BootstrapError::Mismatch { what: Agreed::Version, ours: 1, theirs: 9, .. })
        ));
    }

    proptest! {
        #[test]
        fn garbage_never_passes(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), magic in any::<bool>()) {
            if magic {
                bytes.splice(..0, MAGIC);
            }
            let (key, own) = (JobKey::new(None, "a"), greeting(0));
            prop_assert!(challenge(&key, &own, &mut Tape::new(&bytes)).is_err());
            prop_assert!(prove(&key, &own, &greeting(1), &mut Tape::new(&bytes)).is_err());
            prop_assert!(greet(&own, &mut Tape::new(&bytes)).is_err() || bytes.starts_with(&MAGIC));
        }
    }
}
